"""Where and why a quantized model departs from the float one."""
