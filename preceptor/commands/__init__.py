"""The commands beside ``run`` and ``reproduce``: each module has a ``Config`` and a ``main``."""
