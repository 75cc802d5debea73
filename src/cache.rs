//! The watch cache as a client sees it: reads at a freshness, and the store and feed behind them.
