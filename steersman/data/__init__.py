"""Human feedback as data: row types, importers, agreement, releases and exports."""
