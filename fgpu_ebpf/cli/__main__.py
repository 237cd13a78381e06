"""`python -m fgpu_ebpf.cli`: the command `fgpu` without its script."""

import os

from fgpu_ebpf.cli.main import main

if __name__ == "__main__":
    os.umask(0o022)
    main()
