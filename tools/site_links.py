"""Links of a page to files of the repository outside docs/ (a saved result, a report) work on the site too:
each such file is copied into the site, under repository/, and the link points there."""

import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)")


def on_page_markdown(markdown, page, config, files):
    documents = Path(config.docs_dir).resolve()
    root = documents.parent

    def copied(match):
        path = (documents / PurePosixPath(page.file.src_path).parent / match[1]).resolve()
        if path.is_relative_to(documents) or not path.is_relative_to(root) or not path.is_file():
            return match[0]
        uri = f"repository/{path.relative_to(root).as_posix()}"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        return f"]({'../' * (len(PurePosixPath(page.file.src_path).parts) - 1)}{uri}"

    return LINK.sub(copied, markdown)
