"""Starting the ranks of a run on this machine; torchrun does it on several."""
