"""The records that the zoo writes."""

from collections.abc import Mapping

from hardware.records import Record

CRASHED = ("failed", "timeout", "memory")
WRONG = "wrong proof"


class Peer(Record):
    """What Torch-Pruning made of a network."""

    # "ok" | "failed" | "wrong" | "not prunable" | "timeout" | "memory" | "not installed"
    status: str
    seconds: float = 0.0  # processor time of the pruning, one thread
    prunable_share: float = 0.0
    detail: str = ""


class Entry(Record):
    """What the channel analysis made of a network."""

    name: str
    status: str  # "ok" | "wrong proof" | "not prunable" | "failed" | "timeout" | "memory"
    detail: str = ""  # the error, why the proof is in float32, or what was built instead
    seconds: float = 0.0  # processor time of the analysis alone, one thread
    whole_seconds: float = 0.0  # processor time of everything, export and proof included
    peak_mib: float = 0.0
    nodes: int = 0
    groups: int = 0
    mixing_groups: int = 0  # groups whose channels an operator mixes
    proved_groups: int = 0  # groups that were removed and masked; the others' structure is checked
    prunable_share: float = 0.0  # of the output channels of all convolutions
    frozen: Mapping[str, int] = {}  # reason -> channels
    proof_error: float | None = None  # largest |removed - masked| / largest |masked|
    proof_precision: str | None = None  # "float64"; "float32" where torch cannot run the graph
    ort_parity: float | None = (
        None  # the same of the delivered engine against the pruned torch network
    )
    export_error: float | None = None  # the same of the graph against the network's class
    class_share: float | None = None  # what surgery on the class can prune
    torch_pruning: Peer | None = None


class Summary(Record):
    """The zoo in a few numbers."""

    networks: int
    crashed: int
    wrong_proofs: int
    prunable_pct: float
    mean_prunable_share: float
    torch_pruning_ok: int | None = None
    torch_pruning_networks: int | None = None
    torch_pruning_mean_prunable_share: float | None = None


class Zoo(Record):
    """A run over the zoo, whole or in part."""

    networks: tuple[Entry, ...] = ()
    summary: Summary | None = None


def summarize(entries: tuple[Entry, ...]) -> Summary | None:
    """Return the summary of some entries, None where there are none.

    A network that could not be analysed counts as a share of 0, for Torch-Pruning as for us.
    """
    if not entries:
        return None
    peers = [entry.torch_pruning for entry in entries if entry.torch_pruning is not None]
    peers = [peer for peer in peers if peer.status != "not installed"]
    good = [peer for peer in peers if peer.status == "ok"]
    return Summary(
        networks=len(entries),
        crashed=sum(entry.status in CRASHED for entry in entries),
        wrong_proofs=sum(entry.status == WRONG for entry in entries),
        prunable_pct=100 * sum(entry.status == "ok" for entry in entries) / len(entries),
        mean_prunable_share=sum(entry.prunable_share for entry in entries if entry.status == "ok")
        / len(entries),
        torch_pruning_ok=len(good) if peers else None,
        torch_pruning_networks=len(peers) if peers else None,
        torch_pruning_mean_prunable_share=(
            sum(peer.prunable_share for peer in good) / len(peers) if peers else None
        ),
    )
