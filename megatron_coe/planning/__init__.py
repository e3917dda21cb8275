"""What a layout costs before it is paid for: memory, communication and time of a rank, on paper."""
