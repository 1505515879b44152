"""The steps that flows are made of, and the three rooms (vsphere, transports, images) they stand on."""
