"""What a run reports: metrics, progress, losses per source, summary, reporters."""
