"""A training run from its settings to its exit status."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_coe.checkpoint.errors import CheckpointWriteError
from megatron_coe.fault_tolerance.exceptions import (
    NotFiniteError,
    RankError,
    StoppedError,
    status_of,
)
from megatron_coe.fault_tolerance.exit_codes import CONFIG_ERROR, DONE, NOT_WRITTEN, RANK_FAILURE
from megatron_coe.fault_tolerance.signals import StopRequest, unblock
from megatron_coe.megatron_compat.transformer_engine import broken_by
from megatron_coe.utils.errors import DataError
from megatron_coe.utils.imports import collected_later, missing_package, quiet_imports
from megatron_coe.utils.ranks import is_local_rank_0, is_rank_0

if TYPE_CHECKING:
    from megatron_coe.training.trainer import Trainer


@dataclass(frozen=True)
class Request:
    """The request of a training command.

    Attributes:
        config: YAML file of the run.
        overrides: `section.key=value`, which win over the file.
        dry_run: print settings, sizes and data, and stop.
        eval_only: validate the latest checkpoint, and stop.
        name: of the program, in messages.
        is_process: whether the process ends with the run; a signal may then end it.
    """

    config: Path
    overrides: Sequence[str] = ()
    dry_run: bool = False
    eval_only: bool = False
    name: str = "pretrain_coe.py"
    is_process: bool = True


def pretrain(request: Request) -> int:
    """Train, resume, validate or describe a run; print errors.

    Returns: exit status (`megatron_coe.fault_tolerance.exit_codes`).
    """
    # Threads that wait for others sleep, instead of keeping busy a core that another could use.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    stop = StopRequest()
    try:
        with ExitStack() as stack:
            if request.dry_run or request.eval_only:  # nothing to save: signals do what they do
                unblock()
            else:
                stack.enter_context(stop.listening(process_ends=request.is_process))
            try:
                trainer = _prepare(request, stack, stop)
            except CheckpointWriteError:
                raise
            except Exception as error:
                reported = broken_by(error) or missing_package(error) or error
                if not isinstance(reported, ValueError | OSError):
                    raise
                return _report(request, reported, CONFIG_ERROR)
            if trainer is None:
                return DONE
            if request.eval_only:
                trainer.validate()
                return DONE
            reason = trainer.run(stop)
        if reason is not None:
            return status_of(reason, saves=trainer.checkpointer.options.save is not None)
        return NOT_WRITTEN if trainer.has_failed_exports else DONE
    except KeyboardInterrupt:
        print(f"\n{request.name}: stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    except StoppedError as end:
        if is_rank_0():
            print(end, flush=True)
        return end.status
    except RankError as error:
        return _report(request, error, RANK_FAILURE)
    except NotFiniteError as end:
        return _report(request, end, end.status)
    except DataError as error:
        return _report(request, error, CONFIG_ERROR)
    except OSError as error:  # of a checkpoint or a record of the run
        return _report(request, error, NOT_WRITTEN)
    except Exception:
        traceback.print_exc()
        return RANK_FAILURE


def _prepare(request: Request, stack: ExitStack, stop: StopRequest) -> Trainer | None:
    """Return the trainer, ready for its first step; None after a dry run.

    Raises: ValueError, OSError: whatever the user can fix.
    """
    # Megatron and torch are imported after the checks that need neither: they take seconds.
    from megatron_coe.checkpoint.directory import check_start
    from megatron_coe.config import validation
    from megatron_coe.config.loader import load_settings, settings_files

    settings = load_settings(request.config, request.overrides)
    validation.check_values(settings)
    validation.check_files_named(settings, held_out=request.eval_only)
    check_start(settings.checkpoint)
    world_size = validation.world_size()
    if request.dry_run:  # one process can look at a layout for many
        world_size = max(world_size, validation.smallest_world_size(settings.parallel))
    validation.check_layout(settings, world_size)
    # Every module of Megatron warns of it; `model.backend` selects the replacement.
    quiet_imports()
    warnings.filterwarnings("ignore", message="The legacy GroupedMLP will be deprecated")
    # 0.19's, in a process that no launcher started: it is rank 0, as it says.
    warnings.filterwarnings("ignore", message="Could not determine rank from torch.distributed")
    with collected_later():
        from megatron_coe.training import build

    if request.dry_run:
        print(build.describe(settings, world_size))
        return None
    sources = settings_files(request.config)
    return stack.enter_context(build.trainer(settings, request.eval_only, stop, sources))


def _report(request: Request, error: Exception, status: int) -> int:
    if is_local_rank_0():  # one message per machine
        print(f"{request.name}: error: {error}", file=sys.stderr)
    return status
