"""echoatt: similar layers share one attention matrix."""
