"""What fleet lacks on CPU processes that talk over gloo; never loaded where groups are NCCL's."""
