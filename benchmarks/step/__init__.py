"""What a training step costs: time, parts, launching, communication, saving, start-up."""
