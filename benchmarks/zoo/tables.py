"""Write the zoo as a Markdown table."""

from benchmarks.zoo.records import Entry, Zoo


def to_markdown(zoo: Zoo, of: int) -> str:
    """Return a page with the summary and one row per network.

    Args:
        zoo: a run with at least one network.
        of: how many networks there are in all, so that a part is not taken for the whole.
    """
    assert zoo.summary is not None
    summary, lines = zoo.summary, ["# Channel analysis on many networks", ""]
    covered = f"all {of}" if summary.networks == of else f"**{summary.networks} of {of}**"
    lines += [
        f"Covers {covered} networks of the zoo. {summary.crashed} crashed or exceeded a limit, "
        f"{summary.wrong_proofs} wrong proofs, {summary.prunable_pct:.1f} % prunable, mean "
        f"prunable share of the convolution output channels {summary.mean_prunable_share:.3f}.",
        "",
    ]
    if summary.torch_pruning_networks is not None:
        lines += [
            f"Torch-Pruning: {summary.torch_pruning_ok} of {summary.torch_pruning_networks} "
            f"networks, mean share {summary.torch_pruning_mean_prunable_share:.3f} "
            "(0 where it fails).",
            "",
        ]
    lines += [
        "*analysis s*: processor seconds of the analysis, one thread. *proved*: groups whose "
        "removal was compared with masking; those that an operator mixes (layer norm, channel "
        "softmax) are checked by structure and shapes. *share*: of the convolution output channels "
        "that are prunable; *class*: likewise without leaving the network's class. *error*: "
        "largest |removed - masked| by the largest |masked|, a random half of these groups "
        "removed, random weights, in float64 (f32: where torch cannot run the graph). *parity*: "
        "the network with half of every group removed in ONNX Runtime against torch, likewise. "
        "Written by `python -m benchmarks.zoo`.",
        "",
        "| network | status | analysis s | groups | proved | share | class | error | parity "
        "| MiB | Torch-Pruning | most frequent reason not to prune, or note |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---|",
        *(_row(entry) for entry in zoo.networks),
        "",
    ]
    return "\n".join(lines)


def _row(entry: Entry) -> str:
    reason = entry.detail or next(iter(entry.frozen), "")
    peer = entry.torch_pruning
    cells = [
        entry.name,
        entry.status,
        f"{entry.seconds:.1f}",
        str(entry.groups),
        str(entry.proved_groups),
        f"{entry.prunable_share:.2f}",
        "" if entry.class_share is None else f"{entry.class_share:.2f}",
        _error(entry),
        "" if entry.ort_parity is None else f"{entry.ort_parity:.0e}",
        f"{entry.peak_mib:.0f}",
        ""
        if peer is None
        else f"{peer.prunable_share:.2f}"
        if peer.status == "ok"
        else peer.status,
        reason.replace("|", "/").replace("\n", " ")[:100],
    ]
    return f"| {' | '.join(cells)} |"


def _error(entry: Entry) -> str:
    if entry.proof_error is None:
        return ""
    return f"{entry.proof_error:.0e}" + (" f32" if entry.proof_precision == "float32" else "")
