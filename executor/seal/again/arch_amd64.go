package again

const amd64 = 1
