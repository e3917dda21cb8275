"""Train a Chain-of-Experts model: settings in, checkpoints and curves out.

    python pretrain_coe.py --config examples/quickstart.yaml train.steps=100
    torchrun --nproc-per-node 8 pretrain_coe.py --config examples/paper/coe-2_4-64.yaml

Run again, the same command goes on from its newest checkpoint. SIGTERM, SIGINT (Ctrl-C) and SIGUSR1
end it before the next step, saved; a second Ctrl-C ends it at once.

Exit status: 0 done; 2 a mistake in settings, data or checkpoint, said in one line (also: there are
checkpoints, and none is good); 65 loss or gradients were not finite, nothing was updated; 70 a rank
hung, died or failed, and is named; 74 a checkpoint could not be written, earlier ones are intact;
75 ended by a signal, to be continued by the same command; 128 + number of the signal (130 for
Ctrl-C) that ended it without a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_coe.checkpoint.errors import CheckpointWriteError
from megatron_coe.cli.command_line import missing_package, quiet_imports
from megatron_coe.fault_tolerance.exceptions import (
    DeviceMemoryError,
    NotFiniteError,
    StoppedError,
    stopped,
)
from megatron_coe.fault_tolerance.exit_codes import CONFIG_ERROR, DONE, NOT_WRITTEN, RANK_FAILURE
from megatron_coe.fault_tolerance.signals import StopRequest, unblock
from megatron_coe.megatron_compat.transformer_engine import broken_by
from megatron_coe.utils.errors import DataError
from megatron_coe.utils.ranks import is_local_rank_0, is_rank_0

if TYPE_CHECKING:
    from megatron_coe.training.trainer import Trainer


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Threads that wait for others sleep, instead of keeping busy a core that another could use.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    stop = StopRequest()
    try:
        with ExitStack() as stack:
            if options.dry_run or options.eval_only:  # nothing to save: signals do what they do
                unblock()
            else:
                stack.enter_context(stop.listening(process_ends=arguments is None))
            try:
                trainer = prepare(options, stack, stop)
            except CheckpointWriteError:
                raise
            except Exception as error:
                told = broken_by(error) or missing_package(error) or error
                if not isinstance(told, ValueError | OSError):
                    raise
                return complain(told, CONFIG_ERROR)
            if trainer is None:
                return DONE
            if options.eval_only:
                trainer.validate()
                return DONE
            reason = trainer.run(stop)
            if reason is None:
                return DONE
            return stopped(reason, saves=trainer.settings.checkpoint.save is not None)
    except KeyboardInterrupt:
        print("\npretrain_coe.py: stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    except StoppedError as end:
        if is_rank_0():
            print(end, flush=True)
        return end.status
    except DeviceMemoryError as error:
        return complain(error, RANK_FAILURE)
    except NotFiniteError as end:
        return complain(end, end.status)
    except DataError as error:
        return complain(error, CONFIG_ERROR)
    except OSError as error:  # of a checkpoint or a record of the run
        return complain(error, NOT_WRITTEN)
    except Exception:
        traceback.print_exc()
        return RANK_FAILURE


def prepare(options: argparse.Namespace, stack: ExitStack, stop: StopRequest) -> Trainer | None:
    """The trainer, ready for its first step (nothing after a dry run).

    Raises ValueError or OSError for whatever the user can mend.
    """
    # Megatron and torch are imported only after what can be said without them: they take seconds.
    from megatron_coe.checkpoint.directory import check_start
    from megatron_coe.config import validation
    from megatron_coe.config.run_config import load_settings, settings_files

    settings = load_settings(options.config, options.overrides)
    validation.check_values(settings)
    validation.check_files_named(settings, held_out=options.eval_only)
    check_start(settings.checkpoint)
    world_size = validation.world_size()
    if options.dry_run:  # one process can look at a layout for many
        world_size = max(world_size, validation.smallest_world_size(settings))
    validation.check_layout(settings, world_size)
    # Megatron says so in every module; the setting `model.backend` says what stands in.
    quiet_imports()
    warnings.filterwarnings("ignore", message="The legacy GroupedMLP will be deprecated")
    from megatron_coe.training import build

    if options.dry_run:
        print(build.describe(settings, world_size))
        return None
    sources = settings_files(options.config)
    return stack.enter_context(build.trainer(settings, options.eval_only, stop, sources))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that win over the file"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--dry-run", action="store_true", help="print settings, sizes and data, and stop"
    )
    mode.add_argument(
        "--eval-only", action="store_true", help="validate the newest checkpoint, and stop"
    )
    return parser.parse_intermixed_args(arguments)


def complain(error: Exception, status: int) -> int:
    if is_local_rank_0():  # one message per machine
        print(f"pretrain_coe.py: error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
