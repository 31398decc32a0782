"""The loss that damage and gradients are measured by."""

from torch import Tensor, nn

from pipeline.errors import PipelineError


def classification_loss(outputs: object, labels: Tensor, reduction: str) -> Tensor:
    """Return the cross entropy of a network's outputs, nats.

    Args:
        outputs: logits `(batch, classes, ...)`, as the network returned them.
        labels: class numbers `(batch, ...)`.
        reduction: "mean" or "sum" over the batch.

    Raises:
        PipelineError: the network returns something else than logits for these labels.
    """
    if not isinstance(outputs, Tensor):
        raise PipelineError(
            f"The network returns a {type(outputs).__name__}, and measuring a loss takes one "
            "tensor of logits. Wrap the network in a factory that returns its logits alone."
        )
    sizes = (outputs.shape[0], *outputs.shape[2:])
    if outputs.ndim < 2 or tuple(labels.shape) != sizes or int(labels.max()) >= outputs.shape[1]:
        raise PipelineError(
            f"The network gives outputs of shape {tuple(outputs.shape)} for labels of shape "
            f"{tuple(labels.shape)} up to {int(labels.max())}: expected (images, classes). "
            "Set the number of classes in model.arguments."
        )
    return nn.functional.cross_entropy(outputs.float(), labels, reduction=reduction)
