"""Which gfx targets does a binary really contain? Read from its bytes; alone, without an engine or a GPU."""
