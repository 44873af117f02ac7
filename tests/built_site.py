"""python tests/built_site.py FOLDER: checks a built site. Dead links within it, missing pictures, and what its search finds."""

import html.parser
import json
import pathlib
import re
import sys
import urllib.parse
from collections.abc import Iterator
from typing import Any


PAGES = [
    "index",
    "start",
    "papers",
    "loop",
    "api/rmsprop_jax.rmsprop",
    "api/rmsprop_jax.dialects.pytorch",
    "quickstart",
]
# What people type, and the page that must be among the first three.
SEARCHES = {
    "resume": "checkpoints",
    "checkpoint": "checkpoints",
    "carry_over": "api/rmsprop_jax.carry_over",
    "multi GPU": "devices",
    "FSDP": "devices",
    "TPU": "devices",
    "SB3": "projects",
    "Stable Baselines 3": "projects",
    "weight decay": "recipes",
    "gradient accumulation": "recipes",
    "gradient clipping": "recipes",
    "warmup": "recipes",
    "freeze": "recipes",
    "unfreeze": "recipes",
    "learning rate schedule": "recipes",
    "learning rate": "recipes",
    "recompilation": "troubleshooting",
    "NaN": "troubleshooting",
    "metrics": "troubleshooting",
    "BatchNorm": "from_pytorch",
    "tied weights": "from_pytorch",
    "PyTorch": "from_pytorch",
    "Keras": "keras",
    "Hydra": "configuration",
    "FAQ": "faq",
    "install": "start",
    "bfloat16": "memory",
    "memory": "memory",
    "EMA": "memory",
    "OOM": "layers",
    "value_and_update": "layers",
    "mixed precision": "memory",
    "Adam": "choose",
    "TensorBoard": "troubleshooting",
    "EfficientNet": "papers",
    "Equinox": "loop",
    "cite": "cite",
}
FIRST = 3
LAST = ("changelog", "numbers")  # these do not come first


class Page(html.parser.HTMLParser):
    """What a page links to, and where it can be linked to."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.scripts: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value}
        self.places |= {found[name] for name in ("id", "name") if name in found}
        if tag in ("a", "img", "link", "script"):
            self.links += [found[name] for name in ("href", "src") if name in found]
        if tag == "script" and "src" in found:
            self.scripts.append(found["src"])


def problems(folder: pathlib.Path) -> list[str]:
    """What is wrong with a site."""
    pages = {path: Page(path) for path in folder.rglob("*.html")}
    found = [f"{name}.html is missing" for name in PAGES if folder / f"{name}.html" not in pages]
    for path, page in pages.items():
        found += [f"{path}: {link} is not there" for link in page.links if not leads_somewhere(path, link, pages)]
        found += [f"{path}: {script} is not the site's" for script in page.scripts if "//" in script]
    index = search_index(folder)
    for words, page in SEARCHES.items():
        hits = list(dict.fromkeys(search(index, words)))
        if page not in hits[:FIRST] or hits[0].startswith(LAST):
            found.append(f"the search for {words!r} finds {hits[:FIRST]}, not {page}")
    return found


def search_index(folder: pathlib.Path) -> dict[str, Any]:
    text = (folder / "searchindex.js").read_text()
    return json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))


def search(index: dict[str, Any], query: str) -> list[str]:
    """The pages that Sphinx' searchtools.js finds, in its order."""
    from sphinx.search.en import SearchEnglish

    language = SearchEnglish({})
    lower = query.lower().strip()
    terms = {language.stem(word) for word in re.findall(r"\w+", lower) if word not in language.stopwords}
    hits = [*in_titles(index, lower), *in_entries(index, lower), *in_objects(index, lower), *in_text(index, terms)]
    return [index["docnames"][page] for _, _, page in sorted(hits)]


Hit = tuple[float, str, int]  # minus its score, its title, its page


def in_titles(index: dict[str, Any], query: str) -> Iterator[Hit]:
    for title, places in index["alltitles"].items():
        if query in title.lower() and len(query) >= len(title) / 2:
            for page, _ in places:
                own = index["titles"][page]
                shown = title if own == title else f"{own} > {title}"
                yield -(round(15 * len(query) / len(title)) + (own == title)), shown.lower(), page


def in_entries(index: dict[str, Any], query: str) -> Iterator[Hit]:
    """The entries of `{index} ! word`. Those without ! come after everything else."""
    for entry, places in index["indexentries"].items():
        if query in entry and len(query) >= len(entry) / 2:
            for page, _, main in places:
                yield -round(100 * len(query) / len(entry)) * main, index["titles"][page].lower(), page


def in_objects(index: dict[str, Any], query: str) -> Iterator[Hit]:
    priorities = {0: 15, 1: 5, 2: -5}
    for prefix, objects in index["objects"].items():
        for page, _, priority, _, name in objects:
            full = f"{prefix}.{name}".lower().strip(".")
            for term in set(re.findall(r"\w+", query)):
                haystack = f"{full} {index['titles'][page]}".lower()
                if term in full and all(word in haystack for word in re.findall(r"\w+", query)):
                    last = full.rpartition(".")[2]
                    score = 11 if term in (full, last) else 6 if term in last else 0
                    yield -(score + priorities.get(priority, 0)), full, page


def in_text(index: dict[str, Any], terms: set[str]) -> Iterator[Hit]:
    scores: dict[int, dict[str, int]] = {}
    for term in terms:
        for kind, whole, part in (("terms", 5, 2), ("titleterms", 15, 7)):
            words = index[kind]
            exact = {term: whole} if term in words else {}
            partial = {} if exact or len(term) < 3 else {word: part for word in words if term in word}
            for word, score in (exact | partial).items():
                for page in words[word] if isinstance(words[word], list) else [words[word]]:
                    scores.setdefault(page, {})[term] = score
    for page, found in scores.items():
        if len(found) in (len(terms), len([term for term in terms if len(term) > 2])):
            yield -max(found.values()), index["titles"][page].lower(), page


def leads_somewhere(path: pathlib.Path, link: str, pages: dict[pathlib.Path, Page]) -> bool:
    """Whether a link leads to a page and a place in it that are there. Links to other sites are not followed."""
    url = urllib.parse.urlsplit(link)
    if url.scheme or url.netloc:
        return True
    target = path.parent.joinpath(urllib.parse.unquote(url.path)).resolve() if url.path else path
    if target not in pages or not url.fragment:
        return target.is_file()
    return urllib.parse.unquote(url.fragment) in pages[target].places


if __name__ == "__main__":
    wrong = problems(pathlib.Path(sys.argv[1]).resolve())
    print("\n".join(wrong) or "no dead link")
    sys.exit(bool(wrong))
