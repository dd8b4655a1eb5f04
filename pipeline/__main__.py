"""`python -m chainrule.pipeline` is `chainrule`."""

from chainrule.pipeline.cli import main

main()
