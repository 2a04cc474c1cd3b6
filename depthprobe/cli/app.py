"""The `depthprobe` command: its sub-commands, and how errors become one line and an exit code."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, NoReturn

import typer
from typer.main import get_command

import depthprobe
import depthprobe.models  # cheap; silences torchao before a command imports transformers
from depthprobe.cli import check, compare, cost, data, export, init, recommend, runs, sweep
from depthprobe.cli.options import LOG, as_typed
from depthprobe.cli.terminal import VisibleLines, close_streams, echo, open_streams
from depthprobe.errors import BadInput, closest, one_line, short
from depthprobe.runs.processes import SAFE_PATH, FirstProcessError, launched

# disk errors (full, read-only, no permission, gone) are not bugs of the program
DISK_FAULTS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
}  # fmt: skip
# errors for paths that no file can have
PATH_FAULTS = {
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.EILSEQ,
}  # fmt: skip
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
NO_MEMORY = re.compile("can't allocate memory|[Oo]ut of memory")
# signals that schedulers send before they kill a job
INTERRUPTS = [name for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]

# options of other tools and our equivalents, of which the first that the command has is named
SYNONYMS = {
    option: ours.split(", ")
    for options, ours in {
        "--model --model-name --model-path --checkpoint": "--backbone",
        "--dataset --input --log": "--data, --history",
        "--depth --depths --num-layers --n-layers": "--layers",
        "--out --out-dir --output-dir --save -o": "--output",
        "--gpu --cuda": "--device cuda",
        "--lora": "--tuning lora",
        "--workers --num-workers --n-jobs -j": "--jobs",
        "--topk --top-k -k": "--top",
        "--confidence --alpha": "--level",
        "--verbose -v": "--debug",
        "--force": "--overwrite",
        "--batch-size --batch": "--batch, --set recipe.batch_size=N",
        "--max-length --max-len": "--length, --set data.max_history=N",
        "--lr --learning-rate": "--set recipe.learning_rate=X",
        "--precision --dtype --bf16 --fp16": "--dtype, --set recipe.precision=bfloat16",
        "--config --study -c": "the file's name alone: depthprobe sweep STUDY.toml",
        "--resume --continue": "the same command again: it continues a sweep",
    }.items()
    for option in options.split()
}
# for commands that read more than logs
SYNONYMS |= {
    f"--{name.replace('_', '-')}": [f"--set {flag.setting}=VALUE"] for name, flag in LOG.items()
}
EXAMPLES = {
    "find": "find --data log.csv --backbone model/ --margin 2%",
    "sweep": "sweep --data log.csv --backbone model/ --layers 1,2,4",
    "train": "train --methods full,finetune --layers 1,2,4",
    "probe": "probe --data log.csv --backbone model/",
    "distill": "distill --data log.csv --backbone model/ --layers 2",
    "init": "init study.toml --data log.csv --backbone model/",
    "report": "report runs/demo --margin 2%",
    "status": "status runs/demo",
    "cost": "cost --backbone model/ --layers 1-12",
    "compare": "compare full.csv small.csv --margin 2%",
    "export": "export runs/demo finetune-d02-s0 small/",
    "recommend": "recommend small/ --history histories.txt --top 10",
    "check": "check --backbone model/",
    "prepare": "data prepare log.csv prepared/ --core 5",
    "show": "data show log.csv",
    "list": "data list",
}
# the base class of usage errors; typer has its own copy of click, so no import path is stable
UsageError = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

# plain help: with rich, --help would take a quarter of a second longer
app = typer.Typer(
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="How many layers does an LLM-based recommender need, and what do fewer save?"
    "\n\nRun the demo: depthprobe sweep",
)


def _version(given: bool) -> None:
    if given:
        typer.echo(f"depthprobe {depthprobe.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print tracebacks and log lines. Works anywhere.")
    ] = False,
) -> None:
    """Options before any command; ``main`` takes ``--debug`` out of the arguments."""


for _name, _phase in sweep.PHASES.items():
    app.command(_name, help=_phase.help, epilog=_phase.list_methods())(sweep.sweep)
for _command in (
    *(init.init, runs.report, runs.status, compare.compare, cost.cost, export.export),
    *(recommend.recommend, check.check),
):
    app.command()(_command)
app.add_typer(data.app, name="data")
for _info in (*app.registered_commands, *data.app.registered_commands):
    _text = _info.help or inspect.getdoc(_info.callback) or ""
    _name = str(_info.name or getattr(_info.callback, "__name__", ""))
    _info.short_help = _text.partition("\n\n")[0]
    _info.help = f"Example: depthprobe {EXAMPLES[_name]}\n\n{_text}"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 done, 1 some trials failed, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    open_streams()
    os.environ.update(SAFE_PATH)  # inherited by every process started here
    _quiet_libraries(debug)
    code = _run([word for word in arguments if word != "--debug"] or ["--help"], debug)
    close_streams()
    with suppress(BadInput):  # a variable of the launcher that is not a number
        if launched():
            # A gloo thread that still holds a tensor when the interpreter exits aborts the
            # process, so the launcher reports a finished sweep as failed (pytorch issue 190489).
            os._exit(code)
    sys.exit(code)


def _quiet_libraries(debug: bool) -> None:
    """Configure logging, and keep other libraries off the terminal."""
    for name in ("COLUMNS", "LINES"):  # rich would read other digits as numbers, and fail
        if not re.fullmatch("[0-9]{1,4}", os.environ.get(name, "80")):
            del os.environ[name]
    # the tokenizers' threads and a forked worker don't mix, and their warning breaks the progress
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    handler = logging.StreamHandler()
    handler.setFormatter(VisibleLines("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    if debug:
        logging.getLogger("depthprobe").setLevel(logging.INFO)
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # their progress bars would disturb ours


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _run(arguments: list[str], debug: bool) -> int:
    if threading.current_thread() is threading.main_thread():
        for name in INTERRUPTS:
            signal.signal(getattr(signal, name), _interrupt)
    try:
        # a run's manifest records the arguments, so the context passes them to the command
        code = get_command(app).main(
            arguments, prog_name="depthprobe", standalone_mode=False, obj=tuple(arguments)
        )
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output is gone
        return FAILED
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if debug:
            echo(traceback.format_exc().rstrip(), sys.stderr)
        if isinstance(error, BadInput):
            return _fail(str(as_typed(error, arguments)), BAD_INPUT)
        if isinstance(error, UsageError):
            return _fail(_usage(error), BAD_INPUT)
        if isinstance(error, FirstProcessError):
            return _fail(str(error), FAILED)
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            place = f": {error.filename}" if error.filename else ""
            reason = f"{os.strerror(error.errno or 0)}{place}"
            return _fail(f"{reason}; fix that, then run the same command to continue", FAILED)
        if isinstance(error, OSError) and error.errno in PATH_FAULTS:
            return _fail(f"{os.strerror(error.errno or 0)}: {short(error.filename)}", BAD_INPUT)
        if isinstance(error, ValueError) and str(error).startswith("embedded null"):
            return _fail("a path holds a NUL character", BAD_INPUT)
        # numpy, torch on a CPU, torch on a GPU
        if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
            return _fail(f"not enough memory: {str(error).partition(chr(10))[0]}", FAILED)
        hint = "" if debug else " (run again with --debug)"
        return _fail(f"internal: {type(error).__name__}: {error}{hint}", FAILED)
    if code == INTERRUPTED:
        return _fail("interrupted; the same command continues a sweep", INTERRUPTED)
    return int(code or DONE)


def _usage(error: Exception) -> str:
    text: str = error.format_message()  # type: ignore[attr-defined]
    text, invalid = re.subn("^Invalid value for '(.*?)': ", r"\1: ", text)
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    if invalid or context is None:
        return text
    if text.startswith("Missing") and parameter is not None:
        name = next((word for word in parameter.opts if word[0] == "-"), parameter.metavar)
        return f"{name}: required. {parameter.help}"
    known = getattr(context.command, "commands", None)
    allowed = f"one of {', '.join(known)}" if known else f"see {context.command_path} --help"
    if option := getattr(error, "option_name", None):
        text = f"No such option: {option}"
        has = [word for each in context.command.params for word in each.opts]
        ours = [
            each for each in SYNONYMS.get(option, ()) if each[0] != "-" or each.split()[0] in has
        ]
        if ours:
            return f"{text}; use {ours[0]}"
        if close := closest(option, has, cutoff=0.7):
            allowed = f"did you mean {' or '.join(close)}?"
    elif (match := re.match("No such command '([^']*)'", text)) and known:
        text = match[0]
        if close := closest(match[1], known, cutoff=0.6):
            allowed = f"did you mean {' or '.join(close)}?"
    return f"{text.rstrip('.?')}; {allowed}"


def _fail(message: str, code: int) -> int:
    with suppress(OSError):  # nobody reads it
        echo(one_line(f"error: {message}"), sys.stderr)
    return code
