"""Adds a page for each method to the documentation, written from its docstring (a mkdocs hook)."""

from __future__ import annotations

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from preceptor.catalogue import Method, find_methods, markdown_table, read_presets, read_settings


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Names the methods' pages in the navigation."""
    methods = [{method.name: f"methods/{method.name}.md"} for method in find_methods()]
    config.nav.append({"Methods": [{"All methods": "methods/index.md"}, *methods]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    methods = find_methods()
    table = "# Methods\n\n" + markdown_table(methods, link="{name}.md")
    files.append(File.generated(config, "methods/index.md", content=table))
    for method in methods:
        files.append(File.generated(config, f"methods/{method.name}.md", content=page(method)))
    return files


def page(method: Method) -> str:
    """A method's page: the paper, whether it was reproduced, the docstring, the settings."""
    lines = [
        f"# {method.title}",
        f"{method.summary[:1].upper()}{method.summary[1:]}",
        f"**Paper**: [{method.paper}]({method.link})  \n**Reproduction**: {method.reproduction}  \n"
        f'**Needs**: `pip install "preceptor[{method.requires}]"`',
        f"{method.command}",
        method.text.replace("``", "`"),
        "## Settings",
        "\n".join(_settings(method)),
    ]
    presets = read_presets(method.path)
    if presets:
        lines.append("## Presets")
    lines += [f"`--{name}`\n\n```python\n{source}\n```" for name, source in presets.items()]
    return "\n\n".join(lines) + "\n"


def _settings(method: Method) -> list[str]:
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for setting in read_settings(method.path):
        cells = (
            f"`{setting.name}`",
            f"`{setting.default}`" if setting.default else "",
            setting.help.replace("``", "`"),
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows
