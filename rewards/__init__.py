"""The reward library, one reward a file; installs as ``steerfm.rewards``."""

if __name__ != "steerfm.rewards":
    raise ImportError(
        f"write steerfm.rewards.x, got 'import {__name__}': this folder of the checkout installs as steerfm.rewards, "
        "and a second copy of its classes would not be recognised as rewards."
    )
