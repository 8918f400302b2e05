"""Links of a page to files of the repository outside docs/ (a saved result, a report) work on the site too:
each such file becomes part of the site, under repository/, and the link points there. One in Markdown becomes
a page like those of docs/, and the same holds for its links."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

LINK = re.compile(r"\]\(([^)#\s:]+)")


def _linked_file(link, page_file, config):
    """The path of a link's file and where it stands on the site; None if it is no file of the repository."""
    documents = Path(config.docs_dir).resolve()
    path = (Path(page_file.abs_src_path).parent / link).resolve()
    if path.is_relative_to(documents) and path.is_file():
        return path, path.relative_to(documents).as_posix()
    if path.is_relative_to(documents.parent) and path.is_file():
        return path, f"repository/{path.relative_to(documents.parent).as_posix()}"
    return None


def on_files(files, config):
    # Before the pages are made, so that a file in Markdown gets a page as well.
    unread = list(files.documentation_pages())
    while unread:
        page_file = unread.pop()
        for match in LINK.finditer(page_file.content_string):
            linked = _linked_file(match[1], page_file, config)
            if linked is None or files.get_file_from_path(linked[1]) is not None:
                continue
            path, uri = linked
            file = File.generated(config, uri, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(file)
            if file.is_documentation_page():
                unread.append(file)
    return files


def on_page_markdown(markdown, page, config, files):
    def on_the_site(match):
        linked = _linked_file(match[1], page.file, config)
        if linked is None:
            return match[0]
        return f"]({posixpath.relpath(linked[1], posixpath.dirname(page.file.src_uri))}"

    return LINK.sub(on_the_site, markdown)
