"""What a command prints: progress, notices and text that is safe to print."""
