"""The texts that ``preceptor --help``, ``list`` and ``show`` print."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from preceptor.catalogue import TAUGHT, Method, Setting, markdown_table, read_presets, read_settings
from preceptor.extras import missing_packages

COMMANDS = {
    "list": (
        "list [PATH ...] [--markdown]",
        "the methods, or yours at PATH: what is taught, the paper, what it needs, whether it was reproduced",
    ),
    "show": ("show METHOD", "one method: its equation, its decisions, its settings"),
    "run": (
        "run METHOD [--tiny | --paper | --config FILE] [--resume] [settings]",
        "teach a student; 'preceptor run METHOD --help' lists the settings",
    ),
    "reproduce": (
        "reproduce METHOD [--seeds N] [--full] [--output FOLDER]",
        "the paper's claim, measured beside its baselines; exit status 1 when it does not hold",
    ),
    "new": ("new NAME", "write a method of your own: a folder with a recipe, its reproduction and its test"),
    "chat": ("chat [settings]", "learn from a tutor, or tutor a simulated student, in the terminal"),
    "cache": ("cache [settings]", "keep a teacher's soft targets on disk, once for any number of students"),
    "evaluate": ("evaluate [settings]", "measure a student beside its teacher"),
    "report": ("report [settings]", "write a run's page, report.html"),
    "doctor": ("doctor [settings]", "versions, devices, models, and whether a teacher and a student fit into memory"),
}


def print_help(command: str = "") -> None:
    """Print what all commands do, or one."""
    console = Console(highlight=False)
    if command:
        usage, about = COMMANDS[command]
        console.print(f"usage: preceptor {escape(usage)}\n\n{escape(about[0].upper() + about[1:])}.")
        return
    console.print("[bold]preceptor[/bold] teaches a student what a teacher knows, and measures what was learned.\n")
    table = Table(box=None, show_header=False, padding=(0, 3, 0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for name, (_, about) in COMMANDS.items():
        table.add_row(name, escape(about))
    console.print(table)
    console.print(
        "\nStart with   [bold]preceptor run gkd --tiny[/bold]   (a minute on a laptop), then leave --tiny out."
    )
    console.print("[dim]METHOD is a name that 'preceptor list' shows, or the path of your own, as ./mine.[/dim]")
    console.print("[dim]--debug shows the traceback behind a message; --version the version.[/dim]")


def print_methods(methods: list[Method], *, markdown: bool = False) -> None:
    """Print methods, by what is taught; ``markdown`` gives the README's table instead."""
    if markdown:
        print(markdown_table(methods), end="")
        return
    console = Console(highlight=False)
    for extra in dict.fromkeys([*TAUGHT, *(method.requires for method in methods)]):
        members = [method for method in methods if method.requires == extra]
        if members:
            _print_group(console, extra, members)
    console.print("[dim]preceptor show METHOD · preceptor run METHOD --help[/dim]")


def _print_group(console: Console, extra: str, methods: list[Method]) -> None:
    missing = missing_packages(extra)
    lack = f'needs [yellow]pip install "preceptor\\[{extra}]"[/yellow]'
    state = lack if missing else "" if missing is None else f"[green]{extra} is installed[/green]"
    console.print(f"[bold]{TAUGHT.get(extra, extra or 'Without an extra')}[/bold]   {state if extra else ''}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, leading=1)
    for heading, ratio in (("method", None), ("what is taught, and how", 3), ("paper", 3), ("reproduction", 2)):
        table.add_column(heading, ratio=ratio, no_wrap=ratio is None, overflow="fold")
    for method in methods:
        name = Text(method.address, style="bold cyan")
        table.add_row(name, escape(method.summary), escape(method.paper), escape(method.reproduction))
    console.print(Padding(table, (0, 0, 0, 2)))


def print_method(method: Method) -> None:
    """Print a method's docstring and its settings, from its source: nothing that it requires need be installed."""
    from rich.markdown import Markdown

    console = Console(highlight=False)
    console.print(f"[bold cyan]{method.name}[/bold cyan]   {escape(method.title)}: {escape(method.summary)}\n")
    console.print(f"paper          {escape(method.paper)} {method.link}", soft_wrap=True)
    console.print(f"reproduction   {escape(method.reproduction)}\n")
    console.print(Markdown(method.text))
    console.print(f"\n[bold]Settings[/bold]   preceptor run {method.address} --SETTING VALUE")
    console.print(_settings_table(read_settings(method.path)))
    for name, source in read_presets(method.path).items():
        console.print(f"[bold]--{name}[/bold]  {escape(source)}", soft_wrap=True)
    missing = missing_packages(method.requires)
    if missing:
        console.print(f'\nNeeds {", ".join(missing)}: pip install "preceptor\\[{method.requires}]"')


def _settings_table(settings: list[Setting]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("setting", style="cyan", no_wrap=True)
    table.add_column("default", overflow="fold", max_width=34)
    table.add_column("meaning", overflow="fold")
    for setting in settings:
        meaning = (setting.help or setting.type).replace("``", "")
        table.add_row(setting.name, escape(setting.default), escape(meaning))
    return table
