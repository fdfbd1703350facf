"""Entry point of ``nbvae`` and of ``python -m pyro_nbvae``. An interrupt during imports also prints only one line."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from pyro_nbvae.study.cli import main as run
    except KeyboardInterrupt:
        print("nbvae: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
