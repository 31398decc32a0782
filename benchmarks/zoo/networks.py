"""The networks of the zoo: every torchvision CNN, one small network per timm family.

Written out, so that the list is the same with every version; a name that an installed version does
not know is reported as such. Inputs are the smallest that exercise every stage: the analysis looks
at channels, so pixels only cost time.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from pipeline.networks.load import load_network
from pipeline.recipe import ModelSection
from pipeline.records import Network

SIZE = 64  # pixels, both ways, where the list does not say otherwise

# fmt: off
TORCHVISION = [
    "alexnet", "convnext_tiny", "convnext_small", "convnext_base", "convnext_large",
    "densenet121", "densenet161", "densenet169", "densenet201",
    "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4",
    "efficientnet_b5", "efficientnet_b6", "efficientnet_b7",
    "efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l",
    "googlenet", "inception_v3", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3",
    "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large",
    "regnet_x_400mf", "regnet_x_800mf", "regnet_x_1_6gf", "regnet_x_3_2gf", "regnet_x_8gf",
    "regnet_x_16gf", "regnet_x_32gf",
    "regnet_y_400mf", "regnet_y_800mf", "regnet_y_1_6gf", "regnet_y_3_2gf", "regnet_y_8gf",
    "regnet_y_16gf", "regnet_y_32gf", "regnet_y_128gf",
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
    "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0",
    "squeezenet1_0", "squeezenet1_1",
    "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn",
    "wide_resnet50_2", "wide_resnet101_2",
    "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "deeplabv3_resnet101",
    "fcn_resnet50", "fcn_resnet101", "lraspp_mobilenet_v3_large",
]
# Their post-processing does not export: backbone and heads.
DETECTORS = [
    "fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fcos_resnet50_fpn",
    "keypointrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2",
    "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
]
# One per convolutional family, the smallest that has what makes the family.
TIMM = [
    # ResNets and their kin
    "resnet10t", "resnet18", "resnet26d", "resnet50_gn", "resnetaa34d", "resnetblur18",
    "resnetrs50", "resnext50_32x4d", "seresnet18", "ecaresnet26t", "ecaresnext26t_32x4d",
    "resnetv2_18", "resnetv2_50d_gn", "resnetv2_50d_frn", "resnetv2_50d_evos", "resnetv2_50x1_bit",
    "res2net50_14w_8s", "res2next50", "resnest14d", "resnest50d_1s4x24d", "skresnet18",
    "skresnext50_32x4d", "legacy_seresnet18", "legacy_seresnext26_32x4d", "wide_resnet50_2",
    "tresnet_m", "resnet32ts", "seresnext26ts", "gcresnext26ts", "eca_resnext26ts",
    "bat_resnext26ts", "resnet50_clip_gap",
    # networks of blocks
    "gernet_s", "repvgg_a0", "repvgg_b1g4", "repvgg_d2se", "mobileone_s0", "mobileone_s4",
    "regnetz_b16", "regnetz_b16_evos", "regnetx_002", "regnety_002", "regnetz_005", "regnetv_040",
    "regnety_040_sgn", "nf_regnet_b0", "nf_resnet26", "nf_seresnet26", "nf_ecaresnet26",
    "nfnet_l0", "eca_nfnet_l0", "dm_nfnet_f0", "nfnet_f0",
    # dense, cross-stage-partial and aggregated
    "densenet121", "densenetblur121d", "rdnet_tiny", "dpn48b", "dpn68", "dla34", "dla46_c",
    "dla46x_c", "dla60_res2net", "hrnet_w18_small", "cspresnet50", "cspresnext50", "cspdarknet53",
    "cs3darknet_focus_s", "cs3darknet_s", "cs3sedarknet_l", "cs3edgenet_x", "darknet17",
    "sedarknet21", "darknetaa53", "cspnext_tiny", "vovnet39a", "ese_vovnet19b_slim_dw",
    "eca_vovnet39b", "selecsls42", "hgnet_tiny", "hgnetv2_b0",
    # inception and searched cells
    "inception_v3", "inception_v4", "inception_resnet_v2", "xception41", "xception41p",
    "legacy_xception", "nasnetalarge", "pnasnet5large", "vgg11_bn",
    # mobile
    "efficientnet_b0", "efficientnet_b0_gn", "efficientnet_b0_g16_evos", "efficientnet_cc_b0_4e",
    "efficientnet_lite0", "efficientnet_es", "efficientnet_blur_b0", "efficientnetv2_rw_t",
    "gc_efficientnetv2_rw_t", "tf_efficientnet_b0", "tf_efficientnetv2_b0", "fbnetc_100",
    "fbnetv3_b", "mixnet_s", "tf_mixnet_s", "mnasnet_small", "mobilenet_edgetpu_v2_xs",
    "mobilenetv1_100", "mobilenetv2_050", "mobilenetv3_small_050", "tf_mobilenetv3_small_075",
    "mobilenetv4_conv_small_035", "mobilenetv4_conv_blur_medium", "lcnet_035", "lcnetv2_small",
    "spnasnet_100", "semnasnet_075", "tinynet_e", "hardcorenas_a", "ghostnet_050",
    "ghostnetv2_100", "ghostnetv3_050", "repghostnet_050", "rexnet_100", "rexnetr_100",
    "repvit_m0_9", "fasternet_t0", "starnet_s050", "efficientvit_b0",
    # large kernels, channels last, gates
    "convnext_atto", "convnext_atto_ols", "convnext_zepto_rms", "convnextv2_atto",
    "inception_next_atto", "convmixer_768_32", "convformer_s18", "poolformer_s12",
    "poolformerv2_s12", "mambaout_femto", "focalnet_tiny_srf", "fastvit_t8",
    # convolutions around attention
    "edgenext_xx_small", "mobilevit_xxs", "mobilevitv2_050", "levit_conv_128s", "botnet26t_256",
    "lambda_resnet26t", "halonet26t", "coatnet_pico_rw_224", "nextvit_small", "shvit_s1",
]
# fmt: on
SIZES = {  # what they take, where that is more
    "torchvision:inception_v3": 96,
    "torchvision:ssd300_vgg16": 300,
    "timm:inception_v3": 96,
    "timm:inception_v4": 96,
    "timm:inception_resnet_v2": 96,
    "timm:bat_resnext26ts": 256,
    "timm:botnet26t_256": 256,
    "timm:halonet26t": 256,
    "timm:coatnet_pico_rw_224": 224,
    "timm:levit_conv_128s": 224,
}

# Not as published, and why.
NOTES = {
    "torchvision:regnet_y_128gf": "at half its widths: an ONNX model cannot hold more than 2 GiB",
}


def names() -> tuple[str, ...]:
    """Return the networks of the zoo: `torchvision:NAME`, `timm:NAME`, `own:NAME`."""
    return (
        *(f"torchvision:{name}" for name in [*TORCHVISION, *DETECTORS]),
        *(f"timm:{name}" for name in TIMM),
        *(f"own:{name}" for name in OWN),
    )


def build(name: str) -> Network:
    """Return a network of the zoo with random weights, in evaluation mode.

    Raises:
        NetworkError: the installed torchvision or timm has no such network, or it refuses the size.
    """
    size = SIZES.get(name, SIZE)
    source, _, short = name.partition(":")
    arguments: dict[str, object] = {}
    spec = name
    if source == "own" or short in DETECTORS or name in NOTES:
        spec = "benchmarks.zoo.networks:make"
        arguments = {"name": short}
    elif name in ("torchvision:googlenet", "torchvision:inception_v3"):
        arguments = {"init_weights": False}  # their own draws take seconds
    return load_network(ModelSection(name=spec, arguments=arguments, input_shape=(3, size, size)))


def make(name: str) -> nn.Module:
    """Return a network of the zoo's own, backbone and heads of a detector, or a narrowed one."""
    if name in OWN:
        return OWN[name]()
    from torchvision import models

    if name == "regnet_y_128gf":
        return _half_regnet()

    return Detector(models.get_model(name, weights=None, weights_backbone=None))


def _half_regnet() -> nn.Module:
    """Return torchvision's regnet_y_128gf, 27 blocks deep, with half of its channels."""
    from torchvision.models.regnet import BlockParams, RegNet

    return RegNet(
        BlockParams(
            depths=[2, 7, 17, 1],
            widths=[264, 528, 1452, 3696],
            group_widths=[132] * 4,
            bottleneck_multipliers=[1.0] * 4,
            strides=[2] * 4,
            se_ratio=0.25,
        )
    )


class Detector(nn.Module):
    """Backbone and heads of a torchvision detector, without anchors, selection and suppression."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.rpn_head = model.rpn.head if hasattr(model, "rpn") else None
        self.head = getattr(model, "head", None)
        self.roi_heads = getattr(model, "roi_heads", None)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return what every head says of every map, and what the heads of regions say of one."""
        maps = self.backbone(images)
        maps = list(maps.values()) if isinstance(maps, Mapping) else [maps]
        found: list[Tensor] = []
        if self.rpn_head is not None:
            scores, boxes = self.rpn_head(maps)
            found += [*scores, *boxes]
        if self.head is not None:
            found += list(self.head(maps).values())
        if self.roi_heads is not None:
            found += self._regions(F.adaptive_avg_pool2d(maps[0], 7))
            found += self._pixels(F.adaptive_avg_pool2d(maps[0], 14))
        return found

    def _regions(self, region: Tensor) -> list[Tensor]:
        """Return classes and boxes of a region, here an average of the whole image."""
        assert self.roi_heads is not None
        return list(self.roi_heads.box_predictor(self.roi_heads.box_head(region)))

    def _pixels(self, region: Tensor) -> list[Tensor]:
        """Return masks and keypoints of a region, where the detector has such heads."""
        heads = self.roi_heads
        found = []
        for kind in ("mask", "keypoint"):
            if getattr(heads, f"{kind}_head", None) is not None:
                inner = getattr(heads, f"{kind}_head")(region)
                found.append(getattr(heads, f"{kind}_predictor")(inner))
        return found


class YoloHeads(nn.Module):
    """A small YOLO-style detector: split and bottleneck stages, a two-way pyramid, three heads.

    Reference:
        The layout of Jocher et al., YOLOv8 (2023): C2f stages, SPPF, a path aggregation network
        and decoupled heads whose outputs are flattened and joined.
    """

    def __init__(self, width: int = 16, classes: int = 20) -> None:
        super().__init__()
        w = [width, 2 * width, 4 * width, 8 * width]
        self.stem = _conv(3, w[0], 3, 2)
        self.down = nn.ModuleList(_conv(w[i], w[i + 1], 3, 2) for i in range(3))
        self.stage = nn.ModuleList(_Split(w[i + 1], w[i + 1]) for i in range(3))
        self.reduce = _conv(w[3], w[3] // 2, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.spread = _conv(w[3] * 2, w[3], 1)
        self.up = nn.ModuleList([_Split(w[3] + w[2], w[2]), _Split(w[2] + w[1], w[1])])
        self.lower = nn.ModuleList([_conv(w[1], w[1], 3, 2), _conv(w[2], w[2], 3, 2)])
        self.out = nn.ModuleList([_Split(w[1] + w[2], w[2]), _Split(w[2] + w[3], w[3])])
        self.boxes = nn.ModuleList(_head(w[i], 16) for i in (1, 2, 3))
        self.classes = nn.ModuleList(_head(w[i], classes) for i in (1, 2, 3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return scores `(batch, classes, places)` and boxes `(batch, 16, places)`."""
        x = self.stem(x)
        maps = []
        for down, stage in zip(self.down, self.stage, strict=True):
            x = stage(down(x))
            maps.append(x)
        pooled = [self.reduce(x)]
        for _ in range(3):
            pooled.append(self.pool(pooled[-1]))
        top = self.spread(torch.cat(pooled, 1))
        middle = self.up[0](torch.cat([F.interpolate(top, scale_factor=2.0), maps[1]], 1))
        large = self.up[1](torch.cat([F.interpolate(middle, scale_factor=2.0), maps[0]], 1))
        middle = self.out[0](torch.cat([self.lower[0](large), middle], 1))
        top = self.out[1](torch.cat([self.lower[1](middle), top], 1))
        pyramid = (large, middle, top)
        boxes = [head(m).flatten(2) for head, m in zip(self.boxes, pyramid, strict=True)]
        scores = [head(m).flatten(2) for head, m in zip(self.classes, pyramid, strict=True)]
        return {"scores": torch.cat(scores, 2).sigmoid(), "boxes": torch.cat(boxes, 2)}


class _Split(nn.Module):
    """Half of the channels pass by, half go through bottlenecks, all are joined (C2f)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                _conv(outputs // 2, outputs // 2, 3), _conv(outputs // 2, outputs // 2, 3)
            )
            for _ in range(2)
        )
        self.last = _conv(outputs * 2, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the joined halves."""
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        joined: Tensor = self.last(torch.cat(parts, 1))
        return joined


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            bn=nn.BatchNorm2d(outputs),
            act=nn.SiLU(),
        )
    )


def _head(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, inputs, 3), nn.Conv2d(inputs, outputs, 1))


OWN: dict[str, Callable[[], nn.Module]] = {"yolo_heads": YoloHeads}
