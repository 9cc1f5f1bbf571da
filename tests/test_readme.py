"""What README.md and docs/ say and a test can check: commands and their flags, links, names of
functions.
"""

import functools
import re

import pytest
from conftest import ROOT, script

COMMAND = r"\b(?:python|bash|torchrun)(?: -{1,2}[\w=.]+)* ([\w/]+\.(?:py|sh))([^\n`#|]*)"
LINK = r"\]\((?!https?:|#)([^)#]+)"
PAGES = ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]


def text(page):
    return (
        (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    )  # a command over several lines is one


@functools.cache
def flags_of(file):
    return set(re.findall(r"--(\w+)", script(file, "--help").out))


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_flags(page):
    """Every script named in a command exists, and knows every flag that the command gives it."""
    commands = sorted(set(re.findall(COMMAND, text(page))))
    assert commands or page not in ("README.md", "docs/scale.md", "docs/benchmarks.md"), (
        f"{page}: the pattern finds no command"
    )
    for file, arguments in commands:
        assert (ROOT / file).is_file(), f"{page} runs {file}, which does not exist"
        flags = set(re.findall(r"(?<=\s)--(\w+)", arguments))
        if flags and file.endswith(".py"):
            assert flags <= flags_of(file), (
                f"{page}, `{file}{arguments}`: no {flags - flags_of(file)}"
            )


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    missing = [
        target
        for target in re.findall(LINK, text(page))
        if not ((ROOT / page).parent / target).exists()
    ]
    assert not missing


def test_the_method_in_the_readme_names_real_functions():
    """The dozen lines at the top: each function they call is one of ours."""
    (block,) = re.findall(r"The method, in.*?```python\n(.*?)```", text("README.md"), re.DOTALL)
    called = set(re.findall(r"\b([a-z_]+)\(", block)) - {
        "llm",
        "whisper",
        "qformer",
        "embed",
        "cross_entropy",
    }
    sources = "".join(
        file.read_text(encoding="utf-8")
        for file in [*ROOT.glob("*.py"), *(ROOT / "engine").glob("*.py")]
    )
    assert called and all(re.search(rf"\bdef {name}\(", sources) for name in called), called
