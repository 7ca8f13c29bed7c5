"""What the examples share: a report and the problems that they solve."""
