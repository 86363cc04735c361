"""What makes a batch's items: this process, other processes, Ray."""
