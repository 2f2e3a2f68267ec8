"""The checkpoints of a run: published whole, checked before one is gone on from."""

import logging
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from titans.training.files import publish, read_manifest

logger = logging.getLogger(__name__)

KEPT = 2  # the best and the newest


def checkpoint_name(step: int) -> str:
    """The name of the folder, as the Trainer gives it."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def publish_checkpoint(part: Path, checkpoint: Path, best: str | None) -> None:
    """Gives a checkpoint that was written to ``part`` its name, and deletes those no longer needed but ``best``."""
    for other in _newest_first(checkpoint.parent):
        if _step(other) >= _step(checkpoint):  # broken, or this run would have begun there
            shutil.rmtree(other)
    publish(part, checkpoint)
    rotate_checkpoints(str(checkpoint.parent), KEPT, best_model_checkpoint=best)


def last_checkpoint(run: Path) -> str | None:
    """The newest whole checkpoint of a run; None if it has none yet. Newer, broken ones are named in a warning.

    Raises:
        FileNotFoundError: the folder is no run.
        ValueError: there are checkpoints and all are broken.
    """
    if not (run / "config.yaml").exists():
        raise FileNotFoundError(f"resume={str(run)!r} is no run: it holds no config.yaml; give a run's folder")
    broken = []
    for checkpoint in _newest_first(run / "checkpoints"):
        try:
            read_manifest(checkpoint)
        except (OSError, ValueError) as error:
            broken.append(str(error))
            continue
        for message in broken:
            logger.warning("%s; going on from %s instead", message, checkpoint)
        return str(checkpoint)
    if broken:
        raise ValueError(
            f"no checkpoint of {run} is whole ({'; '.join(broken)}); restore one from a copy, or delete "
            f"{run / 'checkpoints'} to begin anew"
        )
    return None


def _newest_first(checkpoints: Path) -> list[Path]:
    named = checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted((path for path in named if path.name.rpartition("-")[2].isdigit()), key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
