"""The entry point of the command ``nbvae``, and ``python -m pyro_nbvae``: an interrupt is one line from the start."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from pyro_nbvae.cli import main as run
    except KeyboardInterrupt:
        print("nbvae: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
