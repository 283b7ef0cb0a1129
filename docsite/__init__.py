"""The documentation site: what its pages take from the code when they are built.

Pages are Markdown under `docs`. Where one has a line `<!-- generated: NAME -->`, `docsite.hook` puts what the
function of that name in `docsite.pages.GENERATED` makes of the program as it is: a reference cannot go stale.
"""
