"""`python -m knnlm` is the command `knnlm`."""

from knnlm.apps.cli import main

main()
