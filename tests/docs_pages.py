"""README.md and docs/*.md as tests see them: their commands, links, keys, files and Python."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STARTS = ("python", "mae", "torchrun", "sbatch")
SHELL = ("cat", "mkdir", "cp")  # lines that are the shell's own, `a; b` too
PLACES = {"N": "8", "K": "0", "HOST0": "localhost"}  # what pages write where a reader's own numbers and names stand


class Command(NamedTuple):
    """A line of a fenced block, or code in the text, and the sentence with which it is refused where the page shows one."""

    line: str  # as it stands there
    story: str  # of mae.commands; another module, a benchmark or a template in its full name; "shell"
    words: list[str]
    refusal: str = ""  # "mae: ..." or nothing


def blocks(page, *languages):
    """The fenced blocks of a page in these languages."""
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def sound(page):
    """A page without the commands that are refused."""
    return re.sub(r"^.*\nmae: .*$", "", page.read_text(), flags=re.MULTILINE)


def prose(page):
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def commands(page):
    """Every command of a page, in its order; of `a && b` both."""
    found = []
    for text in blocks(page, "", "bash"):
        lines = text.replace("\\\n", " ").splitlines()
        for i, line in enumerate(lines):
            refusal = lines[i + 1] if lines[i + 1 :] and lines[i + 1].startswith("mae: ") else ""
            if line.split(" ")[0] in SHELL:
                found.append(Command(line, "shell", []))
            for part in line.removeprefix("$ ").split(" && "):
                if part.split(" ")[0] in STARTS:
                    found.append(_command(part, refusal))
    return found


def inline_commands(page):
    """Every command in the text of a page that has words: `mae evaluate runs/a ...`."""
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]
    return [_command(span) for span in spans if re.match(r"(mae|python|torchrun) \S+ ", span) and not span.startswith("torchrun -")]


def launches(page):
    """The words of every line of torchrun after that word, those for the launcher first."""
    lines = [command.line for command in commands(page) if command.line.startswith("torchrun ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def installs(page):
    """The extras of every `pip install`, in blocks and in the text."""
    return re.findall(r"pip install [^\n`]*\[([\w,]+)\]", page.read_text())


def _command(part, refusal=""):
    words = shlex.split(part, comments=True)
    while words[0] in ("python", "mae", "torchrun", "sbatch", "-m"):
        launcher = words.pop(0)
        while launcher in ("torchrun", "sbatch") and words[0].startswith("--"):
            words = words[1:] if "=" in words[0] or words[0] == "--standalone" else words[2:]
    story = words.pop(0)
    return Command(part, Path(story).stem if "/" not in story and story.endswith(".py") else story, words, refusal)


def links(page):
    """(text, target) of every link and picture outside of fenced blocks and inline code."""
    return re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "code", prose(page)))


def anchors(page):
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def keys(page):
    """Every configuration key that a page names: `section.key=...` anywhere but where it is refused, `section.key` as inline code."""
    text = sound(page)
    sections = "data|encoder|method|optim|train|evaluate|protocol|track|run"
    named = re.findall(rf"(?<![\w./-])((?:{sections})\.\w+)=", text)
    named += re.findall(rf"`((?:{sections})\.(?!json|yaml|txt)\w+)`", prose(page))
    return sorted(set(named))


def config_files(page):
    """Every file of configs/ that a page names."""
    return sorted(set(re.findall(r"configs/[\w/]+\.yaml", sound(page))))
