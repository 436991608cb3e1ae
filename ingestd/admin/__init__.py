"""What operators and their tools ask a daemon: is it alive, is it ready, how is it doing."""
