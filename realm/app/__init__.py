"""The command line interface and the programs that combine all packages. Within `realm`, only this
package imports `pretrain`, `finetune` and `index`."""
