"""Client and server: keys and data here, the weights of the encrypted part there."""
