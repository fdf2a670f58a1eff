"""`python -m knnlm` is the command `knnlm`."""

from knnlm.apps.cli.main import main

main()
