"""One module per vendor: the only places that know a hub, a server or a container tool by name."""
