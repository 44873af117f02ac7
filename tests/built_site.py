"""python tests/built_site.py FOLDER: checks a built site. Dead links within it, pictures and words that are missing."""

import html.parser
import pathlib
import sys
import urllib.parse


PAGES = [
    "index",
    "start",
    "papers",
    "loop",
    "api/rmsprop_jax.rmsprop",
    "api/rmsprop_jax.dialects.pytorch",
    "quickstart",
]
WORDS = ["freez", "bfloat16", "kera"]  # as the search's index has them, without their endings


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
    index = (folder / "searchindex.js").read_text()
    return found + [f"the search does not know {word}" for word in WORDS if f'"{word}"' not in index]


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
