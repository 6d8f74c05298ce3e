"""`python -m mini_vllm.cli`, for a checkout without installation."""

from mini_vllm.cli import main

main()
