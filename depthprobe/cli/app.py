"""The `depthprobe` command: its sub-commands, and how errors become one line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer
from typer.main import get_command

import depthprobe
from depthprobe.cli import check, cost, data, export, recommend, report, status, sweep
from depthprobe.errors import BadInput
from depthprobe.runs.processes import launched

# a disk that is full, read-only, not ours, or gone: no fault of the program
UNUSABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
}
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

INTERRUPTS = [name for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]

# every usage error's base; typer carries its own copy of click, so the name has no stable home
UsageError = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

# plain help: the rich one costs a quarter of the half second that --help may take
app = typer.Typer(
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="How many layers does an LLM-based recommender need, and what do fewer save?",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"depthprobe {depthprobe.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print tracebacks; may stand anywhere.")
    ] = False,
) -> None:
    """Options before any command; ``--debug`` is taken out of the arguments by ``main``."""


for _name, _phase in sweep.PHASES.items():
    app.command(_name, help=_phase.help)(sweep.command(_phase))
app.command()(report.report)
app.command()(status.status)
app.command()(cost.cost)
app.command()(export.export)
app.command()(recommend.recommend)
app.add_typer(data.app, name="data")
app.command()(check.check)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 done, 1 some trials failed, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    # the tokenizers' threads and a forked worker don't mix, and their warning breaks the progress
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        # loading bars of other libraries would run through the sweep's own progress
        os.environ.setdefault("TQDM_DISABLE", "1")
    _exit(_run([word for word in arguments if word != "--debug"] or ["--help"], debug))


def _exit(code: int) -> NoReturn:
    """Exit; in one of several processes that a launcher started, at once.

    A thread of gloo's that still holds a tensor when the interpreter ends aborts the process, and
    the launcher then calls a finished sweep failed (pytorch issue 190489). Under FSDP such threads
    outlive the group of processes.
    """
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _interrupt(number: int, frame: object) -> NoReturn:
    """What a scheduler sends before it kills is an interrupt, as the user's is."""
    raise KeyboardInterrupt


def _run(arguments: list[str], debug: bool) -> int:
    if threading.current_thread() is threading.main_thread():
        for name in INTERRUPTS:
            signal.signal(getattr(signal, name), _interrupt)
    try:
        command = get_command(app)
        # a run's manifest records the arguments: the context carries them to the command
        code = command.main(
            arguments, prog_name="depthprobe", standalone_mode=False, obj=tuple(arguments)
        )
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, BadInput):
            return _fail(str(error), BAD_INPUT)
        if isinstance(error, UsageError):
            return _fail(_usage(error), BAD_INPUT)
        if isinstance(error, OSError) and error.errno in UNUSABLE:
            return _fail(_unusable(error), FAILED)
        hint = "" if debug else " (run again with --debug)"
        return _fail(f"internal: {type(error).__name__}: {error}{hint}", FAILED)
    if code == INTERRUPTED:
        return _fail("interrupted; the same command continues a sweep", INTERRUPTED)
    return int(code or DONE)


def _unusable(error: OSError) -> str:
    """What the file system refused, in one line."""
    place = f": {error.filename}" if error.filename else ""
    return f"{os.strerror(error.errno or 0)}{place}; once that is mended, the same command goes on"


def _usage(error: Exception) -> str:
    text: str = error.format_message()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    if context is None:
        return text
    known = getattr(context.command, "commands", None)
    allowed = f"one of {', '.join(known)}" if known else f"see {context.command_path} --help"
    return f"{text.rstrip('.?')}; {allowed}"


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
