"""Every error that `pipeline` raises on purpose. Each message says what happened and what to do."""


class PipelineError(Exception):
    """Root of the errors of this package; a command line ends with exit code 2 on any of them."""


class RecipeError(PipelineError):
    """A recipe has an unknown key, a missing one, or a value out of range."""


class NetworkError(PipelineError):
    """A network cannot be found, built or exported, or its weights do not fit."""


class DataError(PipelineError):
    """Images are missing, unreadable, or their classes do not agree."""


class SurgeryError(PipelineError):
    """A network cannot be narrowed as planned."""


class ProofError(PipelineError):
    """A pruned network does not compute what the masked full network computes."""


class PlanError(PipelineError):
    """No plan meets the target; the message says what can be met and which floors bind."""


class TrainingError(PipelineError):
    """Training failed: the loss is not a number, or a checkpoint does not fit."""


def first_line(error: BaseException) -> str:
    """Return the first line of a foreign exception's message, without its final full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
