"""The command line and the programs that combine all packages: the only importer of `pretrain`,
`finetune` and `index`."""
