"""python -m lora_cli: the same as `lora`."""

from lora_cli.cli import main

raise SystemExit(main())
