"""The command line: parse, call, print. Commands are imported when they are called, so `--help` is quick."""

from __future__ import annotations

import errno
import sys
from importlib import import_module
from typing import Any

import click

from radeon_stack import __version__
from radeon_stack.errors import Exit, StackError
from radeon_stack.text import even_unheard, prepare_streams, print_line, silence_unheard

# command → (module:attribute, help). The help stands here too, so that listing it imports nothing;
# a test holds it equal to the command's own.
COMMANDS = {
    "list": ("catalog:list_recipes", "The recipes there are, with their presets."),
    "show": ("catalog:show", "A recipe's effective values, and where each came from."),
    "doctor": (
        "doctor:doctor",
        "Is this machine ready? What exactly is wrong, and the command that mends it.",
    ),
    "gpus": ("gpus:gpus", "The GPUs that ROCm sees: what they are, their numbers for --gpus, and who has them."),
    "diagnose": (
        "doctor:diagnose_log",
        "What does this log say went wrong? Known error texts, nearest to the cause first.",
    ),
    "run": ("run:run", "Run a recipe and record it."),
    "explain": ("explain:explain", "Why a run would be launched as it would."),
    "export": (
        "export:export",
        "A run as files that do not need us; or what runs have made, in a folder for other programs.",
    ),
    "chat": ("chat:chat", "Talk to what was exported, in the terminal."),
    "runs": ("runs:runs", "The runs there were: list, watch, stop, report."),
    "pull": ("pull:pull", "Take the published image that fits this machine: by its labels, not by its name."),
    "image": ("image:image", "Container images: render, build, verify, audit, publish."),
}


class LazyGroup(click.Group):
    """A group whose commands live in modules that are imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        command: click.Command = getattr(import_module(f"radeon_stack.cli.{module}"), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "commands: " + ", ".join(COMMANDS)
            raise click.UsageError(f"no command '{args[0]}'; {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `… | head`: it has read what it wanted; click would end with 1
            return Exit.OK
        finally:
            silence_unheard()

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, help_) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="radeon-stack")
@click.option("--debug", is_flag=True, help="Show tracebacks of expected errors too.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Fine-tuning on AMD Radeon, as commands.

    \b
      radeon-stack doctor                                   # is this machine ready?
      radeon-stack run train-llama --preset demo            # no GPU, no Docker, no model hub
      radeon-stack run train-llama --model ./Meta-Llama-3.1-8B-Instruct
      radeon-stack runs report last
    """
    ctx.obj = debug


def main() -> None:
    """The console script: errors become one line on stderr and an exit code."""
    debug = "--debug" in sys.argv[1:]
    prepare_streams()
    try:
        code = cli.main(standalone_mode=False)
    except StackError as error:
        if debug:
            raise
        code = fail(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:  # its message is the help
        error.show()
        code = Exit.USAGE
    except click.UsageError as error:
        usage = error.ctx.command_path if error.ctx else "radeon-stack"
        code = fail(error.format_message().rstrip("."), Exit.USAGE, f"see: {usage} --help")
    except click.ClickException as error:
        code = fail(error.format_message(), Exit.USAGE)
    except (click.Abort, KeyboardInterrupt):
        code = fail("interrupted", Exit.INTERRUPTED)
    except OSError as error:
        if debug:
            raise
        remedy = "free some room" if error.errno == errno.ENOSPC else ""
        code = fail(f"{error.strerror or error}", Exit.MACHINE, remedy, where=str(error.filename or ""))
    sys.exit(int(code or 0))


def fail(what: str, code: int, remedy: str = "", where: str = "") -> int:
    """Tell an error on stderr, one line; returns the exit code."""
    place = f"{where}: " if where else ""
    with even_unheard():
        print_line("radeon-stack: " + " ".join(f"{place}{what}{f'; {remedy}' if remedy else ''}".split()), sys.stderr)
    return code
