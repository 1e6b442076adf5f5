"""Write the table of methods into the README, from the recipes' docstrings: ``python docs/readme.py [--check]``."""

import sys
from pathlib import Path

from preceptor.catalogue import find_methods, markdown_table

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- methods: written by `make readme` from the recipes' docstrings -->\n", "<!-- end of methods -->"


def with_table(text: str) -> str:
    """The README's text with the table of methods as the recipes now give it."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{markdown_table(find_methods())}\n{END}{after}"


if __name__ == "__main__":
    old = README.read_text(encoding="utf-8")
    new = with_table(old)
    if "--check" in sys.argv[1:] and new != old:
        sys.exit("The README's table of methods is not that of the recipes: run 'make readme'.")
    README.write_text(new, encoding="utf-8")
