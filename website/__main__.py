"""Builds the site into build/site; a warning of Sphinx, such as a broken link, is an error."""

import sys

from sphinx.cmd.build import main

from website.pages import collect
from website.repository import ROOT

if __name__ == "__main__":
    source, output = ROOT / "build" / "site_source", ROOT / "build" / "site"
    collect(source)
    options = ["-b", "html", "-c", str(ROOT / "website"), "-d", str(ROOT / "build" / "doctrees")]
    strict = ["--fail-on-warning", "--keep-going", "--fresh-env", "--quiet"]
    status = main([*options, *strict, str(source), str(output)])
    if status == 0:
        print(f"open {output / 'index.html'}")
    sys.exit(status)
