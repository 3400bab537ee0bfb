package again

const amd64 = 0
