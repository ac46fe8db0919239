"""What processes of a training do, and how they are started."""
